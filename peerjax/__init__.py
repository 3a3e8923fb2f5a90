"""Train language models made of very many tiny experts."""

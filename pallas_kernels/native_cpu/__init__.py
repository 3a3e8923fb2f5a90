"""Kernels for CPUs, in C++. XLA calls them on its own threads.

`build` compiles the library, `library` loads it, and the folders of operations have the functions
that call it. The headers contain the kernels, as plain loops over arrays without XLA or Python.
`handlers.cc` contains the entry points for XLA.
"""

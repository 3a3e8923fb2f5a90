"""Names of stacks and blocks in paths of variables, such as `run_1/block/peer`."""

# The name of the block that a stack scans. A group has `BLOCK_0`, `BLOCK_1` and so on.
BLOCK, GROUP = "block", "group"
_STACK = "run_"


def stack_key(index: int) -> str:
    """Returns the name of a stack in trees of variables, from its place in `model.layers`."""
    return f"{_STACK}{index}"


def stack_index(name: str) -> int | None:
    """Returns the place of a stack from its name, or `None` if the name is not that of a stack."""
    return int(name.removeprefix(_STACK)) if name.startswith(_STACK) else None


def is_stacked(path: str) -> bool:
    """Returns whether a path, with "/" between names, is within a stack.

    The first axis of such an array is that of layers.
    """
    return any(name.startswith(_STACK) for name in path.split("/"))

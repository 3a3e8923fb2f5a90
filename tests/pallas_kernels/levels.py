"""What formats of codes are, stated once more for the oracles of tests."""

# The largest code.
TOP = {"int8": 127, "int4": 7, "int3": 3, "ternary": 1}
# The RMS of codes over the largest, to which scales go.
SPREAD = {"int8": 0.25, "int4": 0.37, "int3": 0.51, "ternary": 0.82}

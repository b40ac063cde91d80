"""The CPU backend: ISA rows, kernel families and their schedule spaces."""

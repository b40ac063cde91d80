"""Tests of the llvm backend."""

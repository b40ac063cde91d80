"""Tests of the bridge to TVM."""

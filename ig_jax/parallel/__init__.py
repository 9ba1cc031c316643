"""Processes of one run, over one or many hosts."""

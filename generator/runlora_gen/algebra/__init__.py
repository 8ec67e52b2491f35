"""Symbols, operations, the table of identities, the enumerator and the scheduler. Imports nothing of torch."""

"""The vocabulary of fedqueue: nouns, errors, settings, object keys, the wire message, faults for tests.

Imports nothing else of ours. Everything here but the plans of faults is a value: parsed and checked at the edge,
trusted inside.
"""

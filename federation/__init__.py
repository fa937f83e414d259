"""The vocabulary of fedqueue: nouns, errors, settings, object keys and the wire message.

Imports nothing else of ours. Everything here is a value: parsed and checked at the edge, trusted inside.
"""

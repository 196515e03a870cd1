"""Constraints: checked, normalised and compiled in a place of their own (docs/structured-output.md).

room.py is the server's side, with turns.py and workers.py. worker.py, compilation.py, schema.py, negation.py and
pattern.py run in worker processes; handle.py runs where grammars are matched.
"""

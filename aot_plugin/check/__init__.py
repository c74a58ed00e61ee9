"""The command ``check``: what a training will do, said before it, without the model's weights.

cli.py      arguments and errors
loading.py  the config as the host validates it, the model's config
facts.py    what is found out, as plain dataclasses
rows.py     facts of the first rows of each entry
run.py      facts of a step: what is sorted together, memory, what is logged
text.py     the facts as text
"""

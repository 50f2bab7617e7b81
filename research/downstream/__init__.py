"""Detection and segmentation with UBN beside BatchNorm, small enough for one CPU thread.

:mod:`.data` makes the pictures from photographs, :mod:`.models` is the table of models, :mod:`.train` trains and
evaluates one of them. `python -m research.downstream --help` lists the commands.
"""

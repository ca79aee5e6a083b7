"""The commands of `python -m tokred`: a module each, which adds itself to the parser."""

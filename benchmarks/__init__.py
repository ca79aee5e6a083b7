"""Measurements beside other people's software; not part of the installed package."""

"""Operators inside other libraries. Each module imports its host when one of its functions is called."""

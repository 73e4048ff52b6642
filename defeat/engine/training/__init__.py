"""The training engine. It is independent of particular methods and detector families."""

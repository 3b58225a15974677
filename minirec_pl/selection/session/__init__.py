"""The shared state of one run, its files and its resume."""

from minirec_pl.selection.session.session import SelectionSession, session_of

__all__ = ["SelectionSession", "session_of"]

"""The public path of `HeadProbe` and `target_signals`."""

from minirec_pl.policy.target_signals import TargetSignals, target_signals
from minirec_pl.selection.probes import HeadProbe

__all__ = ["HeadProbe", "TargetSignals", "target_signals"]

"""The public path of the probes, see `minirec_pl.selection.probes`."""

from minirec_pl.selection.probes import HeadProbe, TargetSignals, target_signals

__all__ = ["HeadProbe", "TargetSignals", "target_signals"]

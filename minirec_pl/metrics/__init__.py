"""Full-ranking metrics of next-item recommendation."""

from minirec_pl.metrics.ranking import MRR, NDCG, Coverage, HitRate, SampleRanks, target_rank, top_items

__all__ = ["MRR", "NDCG", "Coverage", "HitRate", "SampleRanks", "target_rank", "top_items"]

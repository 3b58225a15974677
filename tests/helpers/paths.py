"""Where the tests find what is not a test."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared"
BENCHMARKS, CONFIGS, DOCS = REPOSITORY / "benchmarks", REPOSITORY / "configs", REPOSITORY / "docs"
GOLDEN = SHARED / "golden" / "published_cds_and_vinyl.npz"

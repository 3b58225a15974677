import numpy as np
import pytest
from helpers.paths import GOLDEN


@pytest.fixture(scope="session")
def published():
    """Figures published with the paper's code (CDs_and_Vinyl); they are not part of this repository."""
    if not GOLDEN.is_file():
        pytest.skip(f"the published figures are not at {GOLDEN}")
    with np.load(GOLDEN) as arrays:
        return dict(arrays)

import pytest
from helpers.paths import REPOSITORY
from helpers.toy_data import random_rows, write_dataset

ML_100K = REPOSITORY / "data" / "ml-100k"


@pytest.fixture
def toy(tmp_path):
    """A folder with the dataset `toy`; returns (path, rows)."""
    rows = random_rows()
    write_dataset(tmp_path, rows)
    return tmp_path, rows


@pytest.fixture(scope="session")
def ml_100k():
    """The folder that holds the real MovieLens-100K."""
    if not (ML_100K / "ml-100k.inter").is_file():
        pytest.skip(f"MovieLens-100K is not at {ML_100K}; run 'minirec fetch ml-100k --to data'")
    return ML_100K

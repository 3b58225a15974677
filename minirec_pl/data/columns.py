"""The one place for column names."""

from typing import Final


class Columns:
    """Column names of every table that the library reads or writes; each value is the name itself."""

    USER_ID: Final = "user_id"
    ITEM_ID: Final = "item_id"
    RATING: Final = "rating"
    TIMESTAMP: Final = "timestamp"
    TITLE: Final = "title"
    SPLIT: Final = "split"
    HISTORY_ITEM_ID: Final = "history_item_id"
    HISTORY_RATING: Final = "history_rating"
    HISTORY_TIMESTAMP: Final = "history_timestamp"
    SAMPLE_ID: Final = "sample_id"

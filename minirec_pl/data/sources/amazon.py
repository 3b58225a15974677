"""Amazon Reviews 2023 by category, prepared as for R2ec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from minirec_pl.data.columns import Columns
from minirec_pl.data.samples import BoolArray, IntArray, SampleTable
from minirec_pl.data.sources.assemble import Faults, OnMissing, Samples, make_catalogue, whole_rows
from minirec_pl.data.sources.files import read_json_lines, read_table
from minirec_pl.data.sources.tables import Table, as_id, clean_text, numbers_of, unique_ids
from minirec_pl.utils.errors import InputError

REPOSITORY: Final = "McAuley-Lab/Amazon-Reviews-2023"
HOME: Final = "https://amazon-reviews-2023.github.io"
_ASIN: Final = "parent_asin"
_IDS: Final = (Columns.USER_ID, _ASIN, Columns.TIMESTAMP)
_REVIEW_FIELDS: Final = (*_IDS, Columns.RATING, "helpful_vote", "verified_purchase")
_ITEM_FIELDS: Final = (
    _ASIN,
    Columns.TITLE,
    "price",
    "main_category",
    "average_rating",
    "rating_number",
    "store",
    "categories",
)
_STEP_BACK: Final = pd.DateOffset(months=3)


@dataclass(frozen=True)
class AmazonReviews2023:
    """One category of Amazon Reviews 2023 (arXiv 2403.03952), filtered as R2ec (arXiv 2505.16994) does.

    The steps, after ``preprocess.py`` of https://github.com/YRYangang/RRec (commit 9a7e26f), which follows BIGRec:

    1. Of several reviews of an item by one user the earliest stays; users and items with fewer than ``category_core``
       reviews in the whole category go, again and again until none is left. The dump's own ``5core/rating_only`` file
       is that already.
    2. Items go that have no title (or one of a single character), one that holds ``<span id``, one of more than
       ``max_title_words`` words, or (``priced_only``) no price that is a number.
    3. Reviews from ``start`` to ``end`` stay, and of these the ``k_core``. With fewer than ``min_items`` items left
       ``start`` moves back by three months, as long as its year is later than that of the first review.

    Where this differs from theirs: text keeps its non-ASCII letters; a history holds strictly earlier reviews only; the
    shares of a time split are of reviews, theirs are of samples (a user's first review is not one); repeated items are
    never targets. An earlier version of their script allows titles of 50 words and leaves ``end`` itself out; which one
    the published figures come from could not be verified, nor could the numbers of samples, as that takes the dump.

    Args:
        category: Name of the category as the dump spells it, for instance ``CDs_and_Vinyl``.
        folder: Folder with ``<category>.csv`` (user_id, parent_asin, rating, timestamp) or the raw reviews
            ``<category>.jsonl``, and ``meta_<category>.jsonl``, each perhaps ``.gz``, at any depth; None takes the hub.
        start: First day of the reviews that are kept, ``YYYY-MM-DD``.
        end: End of the reviews that are kept: the beginning of this day, ``YYYY-MM-DD``.
        k_core: Fewest reviews per user and per item between start and end; 0 for no such filter.
        category_core: Fewest reviews per user and per item in the whole category.
        min_items: Fewest items; start moves back by three months until there are as many, and 0 keeps start.
        max_title_words: Longest title, in words.
        priced_only: Drop items without a price.
        item_text: Fields of the metadata that make up the text encoders read, joined by ", ".
        on_missing: Drop reviews without a user, item or time and count them, or raise an ``error``.

    Rewards may ask for helpful_vote and verified_purchase of raw reviews, and for price, main_category, average_rating,
    rating_number, store, categories and what is in ``item_text`` of the metadata.

    Example:
        >>> AmazonReviews2023("CDs_and_Vinyl", folder="data/amazon").read()  # doctest: +SKIP
    """

    category: str
    folder: str | None = None
    start: str = "2022-10-01"
    end: str = "2023-10-01"
    k_core: int = 0
    category_core: int = 5
    min_items: int = 10_000
    max_title_words: int = 20
    priced_only: bool = True
    item_text: Sequence[str] = (Columns.TITLE,)
    on_missing: OnMissing = "drop"

    def read(self) -> Samples:
        """Reads and filters the category.

        Raises:
            InputError: A file is missing (says where to get it) or damaged (names the line), or no review is left.
        """
        faults = Faults()
        path = self._find(f"{self.category}.csv", f"{self.category}.jsonl")
        reviews = self._core(self._reviews(path, faults), path, faults)
        metadata = self._find(f"meta_{self.category}.jsonl")
        items = self._items(metadata, set(reviews[_ASIN]), faults)
        known = reviews[_ASIN].isin({item[_ASIN] for item in items})
        unknown = int((~known).sum())
        faults[f"{path.name}: reviews of items without metadata, or whose metadata was dropped: dropped"] += unknown
        reviews = self._window(reviews[known], path, faults)
        used = set(reviews[_ASIN])
        frame = pd.DataFrame([item for item in items if item[_ASIN] in used]).rename(columns={_ASIN: Columns.ITEM_ID})
        catalogue, frame = make_catalogue(Table(str(metadata), frame), (), self.item_text, faults, self.on_missing)
        table = SampleTable(
            reviews[Columns.USER_ID].tolist(),
            catalogue.indices_of(reviews[_ASIN].tolist()),
            reviews[Columns.TIMESTAMP].to_numpy(),
            len(catalogue),
            reviews[Columns.RATING].to_numpy(),
        )
        return Samples(table, catalogue, str(path), faults, reviews.rename(columns={_ASIN: Columns.ITEM_ID}), frame)

    def _find(self, *names: str) -> Path:
        if self.folder is not None:
            for name in (bare + ending for bare in names for ending in ("", ".gz")):
                found = next(iter(sorted(Path(self.folder).rglob(name))), None)
                if found is not None:
                    return found
            raise InputError(
                f"{self.folder} does not hold {' or '.join(names)} (or .gz): download the category from {HOME} into it"
            )
        name = names[0]
        folder = "raw/meta_categories" if name.startswith("meta_") else "benchmark/5core/rating_only"
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(REPOSITORY, f"{folder}/{name}", repo_type="dataset"))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{folder}/{name} of the hub's {REPOSITORY} cannot be downloaded ({reason}): get "
                f"{self.category}.csv.gz (5-core, rating only) and meta_{self.category}.jsonl.gz from {HOME}, put them "
                "into a folder and give that as folder"
            ) from error

    def _reviews(self, path: Path, faults: Faults) -> pd.DataFrame:
        if ".csv" in path.suffixes:
            table = read_table(path).select({}, (Columns.USER_ID, Columns.RATING, Columns.TIMESTAMP))
            if _ASIN not in table.frame:
                raise InputError(f"{path}, line 1: there is no column {_ASIN}: give the dump's rating_only file")
        else:
            rows = ([number, *(found.get(name) for name in _REVIEW_FIELDS)] for number, found in read_json_lines(path))
            frame = pd.DataFrame(rows, columns=["", *_REVIEW_FIELDS])
            table = Table(str(path), frame[[*_REVIEW_FIELDS]], True, frame[""].to_numpy(dtype=np.int64))
        if table.frame.empty:
            raise InputError(f"{path} holds no reviews: give the file of another category than {self.category}")
        table = whole_rows(table, _IDS, faults, self.on_missing)
        ratings = numbers_of(table, Columns.RATING, required=False)
        faults[f"{path.name}: ratings that are missing: kept as unknown"] += int(np.isnan(ratings).sum())
        frame = table.frame.assign(
            **{name: unique_ids(table.frame[name]) for name in (Columns.USER_ID, _ASIN)},
            rating=ratings,
            timestamp=numbers_of(table, Columns.TIMESTAMP, required=True) / 1000,
        )
        earliest = frame.sort_values(Columns.TIMESTAMP, kind="stable")
        repeated = earliest.duplicated([Columns.USER_ID, _ASIN])
        faults[f"{path.name}: reviews of an item that the user reviewed before: dropped"] += int(repeated.sum())
        return earliest[~repeated].sort_index()

    def _core(self, reviews: pd.DataFrame, path: Path, faults: Faults) -> pd.DataFrame:
        kept, k = _in_core(reviews, self.category_core), self.category_core
        faults[f"{path.name}: reviews outside of the {k}-core of the category: dropped"] += int((~kept).sum())
        return reviews[kept]

    def _items(self, path: Path, used: set[str], faults: Faults) -> list[dict[str, Any]]:
        kept: list[dict[str, Any]] = []
        names = tuple(dict.fromkeys((*_ITEM_FIELDS, *self.item_text)))
        for _, found in read_json_lines(path):
            item = {name: found.get(name) for name in names}
            item[_ASIN] = as_id(item[_ASIN])
            if item[_ASIN] not in used:
                continue
            fault = self._fault(item)
            if fault is None:
                kept.append({**item, Columns.TITLE: clean_text(item[Columns.TITLE]).strip('"')})
            else:
                faults[f"{path.name}: items {fault}: dropped"] += 1
        return kept

    def _fault(self, item: dict[str, Any]) -> str | None:
        title = clean_text(item[Columns.TITLE]).strip('"')
        if len(title) <= 1:
            return "without a title"
        if "<span id" in title:
            return "whose title is HTML"
        if len(title.split()) > self.max_title_words:
            return f"with a title of more than {self.max_title_words} words"
        try:
            float(item["price"])
        except (TypeError, ValueError):
            return "without a price" if self.priced_only else None
        return None

    def _window(self, reviews: pd.DataFrame, path: Path, faults: Faults) -> pd.DataFrame:
        moments = {"start": self.start, "end": self.end}
        for name, value in moments.items():
            if pd.isna(pd.to_datetime(value, errors="coerce", format="ISO8601")):
                raise InputError(f"{name}={value!r} is not a date: write YYYY-MM-DD")
        start, end = pd.Timestamp(self.start), pd.Timestamp(self.end)
        times = pd.to_datetime(reviews[Columns.TIMESTAMP], unit="s")
        while True:
            inside = reviews[(times >= start) & (times <= end)]
            kept = inside[_in_core(inside, self.k_core)]
            if kept[_ASIN].nunique() >= self.min_items or times.empty or start.year <= times.min().year:
                break
            start -= _STEP_BACK
        faults[f"{path.name}: reviews outside of start and end: dropped"] += len(reviews) - len(inside)
        outside = f"{path.name}: reviews outside of the {self.k_core}-core between start and end: dropped"
        faults[outside] += len(inside) - len(kept)
        if start != pd.Timestamp(self.start):
            months = (pd.Timestamp(self.start).to_period("M") - start.to_period("M")).n
            faults["months that start was moved back to reach min_items"] += months
        if kept.empty:
            raise InputError(
                f"{path}: no review of {self.category} is left of {len(reviews)} between {start:%Y-%m-%d} and "
                f"{end:%Y-%m-%d} with k_core={self.k_core}: widen the time or lower k_core and category_core"
            )
        return kept


def _in_core(reviews: pd.DataFrame, k: int) -> BoolArray:
    """Which rows are in the k-core: each user and item that stays has at least k of the rows that stay."""
    codes: list[IntArray] = [pd.factorize(reviews[name])[0] for name in (Columns.USER_ID, _ASIN)]
    kept = np.ones(len(reviews), dtype=bool)
    while True:
        counts = [np.bincount(column[kept], minlength=len(reviews))[column] for column in codes]
        enough = kept & (counts[0] >= k) & (counts[1] >= k)
        if enough.sum() == kept.sum():
            return kept
        kept = enough

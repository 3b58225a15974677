"""Reads the file of an offline W&B run: LevelDB's log format with protobuf records."""

import json
import struct
import time

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, FILE_HEADER, HEADER = 32_768, 7, 7
WHOLE, LAST = 1, 4


def read_run(folder):
    """The records of the one offline run below a folder, in order; waits for a run that has just been finished."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(600):
        records = read_records(path.read_bytes())
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    raise TimeoutError(f"{path} has no end")


def read_records(data):
    place, parts, records = FILE_HEADER, b"", []
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        place += HEADER
        parts += data[place : place + length]
        place += length
        if kind in (WHOLE, LAST):
            records.append(Record.FromString(parts))
            parts = b""
    return records


def history(records):
    """A dictionary for each logged row; what a histogram or a table consists of is a dictionary in it."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {}
            for item in record.history.item:
                name, *inner = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                if inner:
                    row.setdefault(name, {})[inner[0]] = value
                else:
                    row[name] = value
            rows.append(row)
    return rows


def step_metrics(records):
    """The step metric of each metric that was defined by its name."""
    metrics = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    return {metric.name: metric.step_metric for metric in metrics if metric.step_metric and metric.name}

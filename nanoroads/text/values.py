"""What a row holds, as JSON would hold it: plain Python values, and nothing that is absent.

JSONL, parquet, CSV exports and pandas say "absent" in different ways. A table gives every row every
column, and every object every key of its column, with null where there was none; pandas writes NaN.
All of that is dropped here, once for all layouts, so that the same rows give the same tokens whatever
file they came in. In a list a null keeps its place.
"""

import datetime
import decimal
import math

from nanoroads.errors import InputError

DEEPEST = 100  # lists and objects within one another; what is nested deeper is no row of text


def plain(value, depth=0):
    """A value without absent keys, and without types that JSON does not have.

    Tuples and arrays become lists, numpy's numbers and decimals numbers, dates their ISO text, UTF-8
    bytes text. Raises InputError for what is nested deeper than DEEPEST."""
    if depth > DEEPEST:
        raise InputError(f"nested more than {DEEPEST} deep")
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return value
    if isinstance(value, dict):
        return present({str(key): plain(item, depth + 1) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return [plain(item, depth + 1) for item in value]
    return plain_foreign(value, depth)


def present(values):
    """The entries of a dict that have a value."""
    return {key: value for key, value in values.items() if value is not None}


def plain_foreign(value, depth):
    """What parquet, pandas and numpy have beyond JSON. What is unknown stays as it is."""
    if hasattr(value, "tolist"):  # of numpy: an array, or a number of its own type
        return plain(value.tolist(), depth + 1)
    if isinstance(value, decimal.Decimal):
        if value.is_nan():
            return None
        if abs(value) < 2**53 and value == value.to_integral_value():
            return int(value)
        return float(value)
    if isinstance(value, (datetime.date, datetime.time)):
        if value != value:  # pandas has a date that is absent, and not equal to itself
            return None
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value  # whoever wants text says that it is bytes
    return value

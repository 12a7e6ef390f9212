"""Two roads from preference pairs to a policy, offline DPO and RLHF."""

from importlib.util import find_spec


def check_kernels():
    """Raises ImportError unless `import kernels` finds this project's folder of that name.

    Hugging Face's package has the name too. Installed into an environment where this project was
    installed without -e, it overwrites our folder file by file."""
    try:
        found = find_spec("kernels")
    except ValueError:  # a module that somebody made by hand
        found = None
    place = "a folder without __init__.py, or none"
    if found is not None and found.origin is not None:
        place = found.origin
        if "sequence_logp" in (found.loader.get_source("kernels") or ""):
            return
    raise ImportError(
        f"the package kernels is not nanoroads' own but Hugging Face's or another one ({place}): "
        "run from the checkout, or install nanoroads there with pip install -e"
    )


check_kernels()

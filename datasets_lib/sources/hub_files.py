"""Loads a data set through `datasets`, whose files must be where the data set is: in a local folder, or on the hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets_lib.errors import InputError, MissingFileError
from datasets_lib.foreign import shown
from datasets_lib.images.files import resolved
from datasets_lib.sources.local_layout import LayoutError, check_contents, check_files, check_layout, is_saved


def load(args: Any) -> dict[str, Any]:
    """Return the splits by name; any error of `datasets` becomes one that says what to do."""
    import datasets

    with _found(args) as name:
        if is_saved(Path(name)):
            loaded = datasets.load_from_disk(name)
        else:
            builder = datasets.load_dataset_builder(name, args.dataset_config_name, cache_dir=args.cache_dir)
            files = _checked_files(builder, args)
            if Path(name).is_dir() and not Path(builder.cache_dir).exists():  # else it was unpacked before
                check_contents(files, type(builder).__module__.rpartition(".")[2])
            builder.download_and_prepare()
            loaded = builder.as_dataset()
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    return {name: rows.with_format(None) for name, rows in splits.items()}  # which a saved data set may have


def data_files(args: Any) -> dict[str, list[str]]:
    """Return the paths or URLs of the files of each split; nothing is loaded. Errors are those of `load`."""
    import datasets

    with _found(args) as name:
        builder = datasets.load_dataset_builder(name, args.dataset_config_name, cache_dir=args.cache_dir)
        return _checked_files(builder, args)


def file_folders(args: Any) -> list[str]:
    """Return the folders that the files of a data set may be in: its own first, those of base.allow_outside last."""
    import datasets
    from huggingface_hub import constants

    if Path(args.dataset_name).expanduser().is_dir():
        return [args.dataset_name, *args.allow_outside]
    downloads = Path(args.cache_dir, "downloads") if args.cache_dir else datasets.config.DOWNLOADED_DATASETS_PATH
    own = Path(constants.HF_HUB_CACHE, f"datasets--{args.dataset_name.replace('/', '--')}")
    return [str(own), str(downloads), *args.allow_outside]


def _checked_files(builder: Any, args: Any) -> dict[str, list[str]]:
    """The files of each split. Those of a folder must be in it, those of the hub on the hub: its card can name any."""
    splits = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    files = [file for each in splits.values() for file in each]
    if Path(args.dataset_name).expanduser().is_dir():
        check_files(files, resolved(args.dataset_name), args.allow_outside)
    elif strangers := [file for file in files if not file.startswith("hf://")]:
        raise LayoutError(
            f"base.dataset_name={args.dataset_name}: its card names {shown(repr(strangers[0]))}, which is not on the "
            "hub; download what it names to a folder, and give that"
        )
    return splits


@contextlib.contextmanager
def _found(args: Any) -> Iterator[str]:
    """The name for `datasets` to load; if the hub does not answer, only the cache is searched, without long retries."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    folder, before = Path(args.dataset_name).expanduser(), datasets.config.HF_HUB_OFFLINE
    try:
        if folder.is_dir():
            check_layout(folder.resolve(), args.allow_outside)
        else:
            try:
                HfApi().dataset_info(args.dataset_name, timeout=10)
            except HfHubHTTPError:
                pass  # the hub answered, if only to refuse; load_dataset will say why
            except Exception:
                datasets.config.HF_HUB_OFFLINE = True
        yield str(folder) if folder.is_dir() else args.dataset_name
    except LayoutError:
        raise
    except Exception as error:
        kind = MissingFileError if isinstance(error, OSError) else InputError
        cause = error.__cause__ or error  # `datasets` says no more than that it failed
        raise kind(
            f"base.dataset_name={args.dataset_name} cannot be loaded ({type(cause).__name__}: {shown(cause)}). It is "
            f"looked for as a local folder ({folder.absolute()}), in the cache and on the hub, which must be reachable"
            "; else give a local copy: base.dataset_name=FOLDER (parquet, arrow, images or save_to_disk) or "
            "base.train_data_dir=FOLDER (images)"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before

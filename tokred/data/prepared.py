"""What to do about a TFDS set that is not prepared on this machine, in one sentence."""

from collections.abc import Sequence

FORMAT = "array_record"


def how_to_prepare(
    name: str,
    folder: str,
    *,
    in_other_format: bool,
    manual: Sequence[str] = (),
    packages: str = "",
) -> str:
    """manual: files to download by hand. packages: further ones that preparing needs."""
    found = f"is not prepared in {folder}"
    if in_other_format:
        found = f"in {folder} is prepared in another format than {FORMAT}"
        folder = "ANOTHER_FOLDER"
    by_hand = f"put {' and '.join(manual)} into {folder}/downloads/manual, then " if manual else ""
    return (
        f'{name} {found}: {by_hand}run `pip install "tokred[tf]"{packages}` and '
        f'`python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', file_format='{FORMAT}', data_dir='{folder}')"
        '.download_and_prepare()"`.'
    )

"""The volume from which cloud-init learns what to make of a guest: its data source NoCloud."""

import json

from propolis.backends.block import fat

LABEL = "CIDATA"


def volume(name: str, user_data: str, meta_data: str | None = None, network_config: str | None = None) -> bytes:
    """A FAT12 volume of these texts.

    Without `meta_data`, which cloud-init insists on, the instance and its host are called `name`. Raises ValueError
    where all together are larger than 2 MiB.
    """
    if meta_data is None:
        text = json.dumps(name)  # YAML would read some names as numbers
        meta_data = f"instance-id: {text}\nlocal-hostname: {text}\n"
    files = {"meta-data": meta_data, "user-data": user_data}
    if network_config is not None:
        files["network-config"] = network_config
    return fat.volume(LABEL, {file: content.encode() for file, content in files.items()})

"""Named volumes: directories of the user's that containers see, and that outlive them.

A volume is the directory of its name below $XDG_DATA_HOME/vz/volumes, else ~/.vz/volumes, and nothing more is known of
it: `ls` lists them, `rm -r` removes one.
"""

from __future__ import annotations

import os
import stat

from vzrepro.base.errors import VzreproError
from vzrepro.guest.vm import places
from vzrepro.guest.vm.layer import inside
from vzrepro.guest.vm.rootfs import Image
from vzrepro.guest.vm.spec import Mount, User, Volume


def mount(volume: Volume, image: Image, user: User) -> Mount:
    """The mount that a volume is, made empty if there is none of that name.

    A new one gets owner and mode of the directory that it covers in the image, else it belongs to the container's user;
    the owner only as far as we may give files away. Raises Untrusted, VzreproError.
    """
    home = places.volumes()
    path = home / volume.name
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o755)
    except FileExistsError:
        if not path.is_dir():
            raise VzreproError(f"{path} is not a directory, so it is no volume") from None
        return Mount(path.resolve(), volume.target, volume.read_only)
    except OSError as error:
        raise VzreproError(f"the volume {volume.name} cannot be made", reason=str(error)) from error
    covered = inside(image.root, volume.target)
    uid, gid, mode = user.uid, user.gid, 0o755
    if covered.is_dir():
        found = covered.stat()
        uid, gid, mode = found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)
    if os.geteuid() == 0:
        os.chown(path, uid, gid)
    path.chmod(mode)
    return Mount(path.resolve(), volume.target, volume.read_only)

"""Virtual machines: how QEMU is started (`qemu`), how its guest is talked to (`agent`), a whole boot (`boot`), a
container in a guest of its own (`oci`)."""

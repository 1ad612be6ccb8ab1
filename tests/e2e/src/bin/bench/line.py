"""A line between two network name spaces: a tun device in each, and a program that passes packets
from one to the other. Usage: line.py NAMESPACE NAMESPACE PROGRAM ARGUMENT... The program has the
devices as its standard input and output."""

import fcntl
import os
import struct
import subprocess
import sys

TUNSETIFF = 0x400454CA
TUN_WITHOUT_HEADER = 0x1001


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)


devices = []
for number, space in enumerate(sys.argv[1:3], 1):
    name = f"srn{os.getpid()}-{number}"
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), TUN_WITHOUT_HEADER))
    ip("netns", "add", space)
    ip("link", "set", name, "netns", space)
    ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", name)
    ip("-n", space, "link", "set", name, "mtu", "1500", "up")
    ip("-n", space, "link", "set", "lo", "up")
    devices.append(device)
os.dup2(devices[0], 0)
os.dup2(devices[1], 1)
os.execv(sys.argv[3], sys.argv[3:])

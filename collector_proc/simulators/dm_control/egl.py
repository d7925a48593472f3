"""The number of devices that EGL can render on. Torch-free."""

from __future__ import annotations

import ctypes


def count_devices() -> int | None:
    """Return how many devices EGL shows, or None if EGL is not installed or does not tell.

    It can show fewer than nvidia-smi: in a container without the driver capability "graphics" it shows Mesa's software
    renderer only.
    """
    try:
        egl = ctypes.CDLL("libEGL.so.1")
        egl.eglGetProcAddress.restype = ctypes.c_void_p
        address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    except (OSError, AttributeError):
        return None
    if not address:
        return None
    integer = ctypes.POINTER(ctypes.c_int)
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), integer)(address)
    count = ctypes.c_int()
    return count.value if query(0, None, ctypes.byref(count)) else None

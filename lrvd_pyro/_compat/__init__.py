"""Every use of another library's private parts, one file per library.

The docstring of each function says why no public name will do. Its test, in
``tests/compat``, fails with a readable message when the library has changed.
"""

__all__: list[str] = []

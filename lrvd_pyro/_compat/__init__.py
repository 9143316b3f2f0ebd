"""Every touch of another library's private parts, one file a library.

Each function says in one line why no public name will do. A test of each tells, in
words, what has changed when the library underneath has.
"""

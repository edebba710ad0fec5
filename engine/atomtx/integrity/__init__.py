"""
An integrity database of the files in a tree: what was there, generation by generation.

    entry.py     one name in a tree, and its properties                                pure
    compare.py   two entries, or two generations, to differences in words              pure
    mtree.py     entries as lines of mtree(5)                                          pure
    walk.py      the directories of a tree, in order, never following a link
    hashing.py   read and hash what a directory holds, in threads
    store.py     the database: the only module here that knows SQLite
    scanning.py  a tree into a new generation
    checking.py  a tree against a generation
"""

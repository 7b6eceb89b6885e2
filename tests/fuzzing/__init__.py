"""The parts of the checkpoint fuzzer, ``tests/fuzz_checkpoints.py``.

====================  =================================================================================
``files``             safetensors files as bytes, and a directory of a model before it is written to disk
``draft``, ``values`` a directory that is being changed, and hostile values
``change_config``,    mutations, drawn from a seeded random generator
``change_weights``,
``change_directory``
``mutations``         one to three of them make a hostile directory
``bases``             the saved networks that are changed
``guard``             an audit hook that records and stops writes, requests and code; peak memory
``loaders``           all ways to read a saved directory
``planted``           loaders that do what the fuzzer must find
``oracle``            what is right and wrong about a load
``worker``            a process that loads one directory at a time
``runner``            starts workers, replaces them after a crash or a hang, runs cases
``summary``           counts and the printed report
====================  =================================================================================

``runner``, ``summary`` and the mutations need the standard library alone: the process that starts the workers stays
small.
"""

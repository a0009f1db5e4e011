"The type checker of the tests. An int is a float here, as it is in Python's numeric tower (PEP 484)."
from beartype import BeartypeConf
from beartype import beartype as plain

beartype = plain(conf=BeartypeConf(is_pep484_tower=True))

"""python -m ders_cli"""

from .app import main

main()

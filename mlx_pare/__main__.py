"""python -m mlx_pare"""

from .cli import main

main()

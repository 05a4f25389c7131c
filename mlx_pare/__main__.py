"""python -m mlx_pare"""

from .cli.main import main

main()

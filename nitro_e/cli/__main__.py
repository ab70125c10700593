from nitro_e.cli import main

main()

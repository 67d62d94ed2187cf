from fpxbench.cli import main

main()

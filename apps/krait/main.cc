// krait: the command-line program.
#include "program.h"

int main(int argc, char** argv) { return krait::cli::run_program(argc, argv); }

# What a newcomer tries first: the README's commands, the example, and an installation.
add_test(NAME readme COMMAND ${PROJECT_SOURCE_DIR}/tests/readme_test.sh ${PROJECT_SOURCE_DIR} ${CMAKE_BINARY_DIR})
add_test(NAME example_generate COMMAND example_generate)
set_tests_properties(example_generate PROPERTIES PASS_REGULAR_EXPRESSION "64 tokens in")
add_test(NAME install COMMAND ${CMAKE_COMMAND} -DBUILD=${CMAKE_BINARY_DIR} -DSOURCE=${PROJECT_SOURCE_DIR}
         -DWORK=${CMAKE_BINARY_DIR}/tests/install -DCXX=${CMAKE_CXX_COMPILER} -DFLAGS=${CMAKE_CXX_FLAGS}
         -P ${PROJECT_SOURCE_DIR}/tests/install_test.cmake)
set_tests_properties(readme install PROPERTIES LABELS slow TIMEOUT 600)

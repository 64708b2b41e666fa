# Installs Krait into an empty prefix, builds examples/ against it as a stranger would (find_package), and
# runs what came out: library, program, man page and completions.
#   cmake -DBUILD=<build folder> -DSOURCE=<checkout> -DWORK=<scratch folder> -DCXX=... -DFLAGS=... -P install_test.cmake
function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE code OUTPUT_VARIABLE out ERROR_VARIABLE out)
  if(NOT code EQUAL 0)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "${command}: exit code ${code}\n${out}")
  endif()
  set(output "${out}" PARENT_SCOPE)
endfunction()

file(REMOVE_RECURSE ${WORK})
set(prefix ${WORK}/prefix)
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${prefix})
run(${CMAKE_COMMAND} -S ${SOURCE}/examples -B ${WORK}/build -G Ninja -DCMAKE_PREFIX_PATH=${prefix}
    -DCMAKE_CXX_COMPILER=${CXX} -DCMAKE_CXX_FLAGS=${FLAGS} -DCMAKE_FIND_PACKAGE_NO_PACKAGE_REGISTRY=ON)
run(${CMAKE_COMMAND} --build ${WORK}/build)

run(${WORK}/build/example_generate)
if(NOT output MATCHES "64 tokens in")
  message(FATAL_ERROR "the example printed: ${output}")
endif()
run(${prefix}/bin/krait --version)
if(NOT output MATCHES "^krait [0-9]+\\.[0-9]+\\.[0-9]+\n")
  message(FATAL_ERROR "krait --version printed: ${output}")
endif()
foreach(page man/man1/krait.1 bash-completion/completions/krait zsh/site-functions/_krait
        fish/vendor_completions.d/krait.fish)
  file(READ ${prefix}/share/${page} text)
  if(NOT text MATCHES "max.*new.*tokens")
    message(FATAL_ERROR "${page} does not know --max-new-tokens")
  endif()
endforeach()
file(REMOVE_RECURSE ${WORK})

# A room is a folder of src/ compiled once into an object library krait_<name>. USES names the rooms
# below it, LIBS outside libraries. The library krait is the sum of all rooms; a test links only the
# rooms that it names (and what they use), so that a change elsewhere does not relink it.
set_property(GLOBAL PROPERTY KRAIT_ROOMS "")

function(krait_room name)
  cmake_parse_arguments(ROOM "" "" "SOURCES;USES;LIBS" ${ARGN})
  foreach(source IN LISTS ROOM_SOURCES) # BUILDING-TIME
    if(NOT EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/${source})
      message(STATUS "room ${name}: ${source} is not there yet: room left out")
      return()
    endif()
  endforeach() # BUILDING-TIME
  add_library(krait_${name} OBJECT ${ROOM_SOURCES})
  target_link_libraries(krait_${name} PRIVATE $<BUILD_INTERFACE:krait_flags> ${ROOM_LIBS})
  set(closure ${name})
  foreach(used IN LISTS ROOM_USES)
    get_property(more GLOBAL PROPERTY KRAIT_ROOM_${used})
    if(NOT more)
      message(STATUS "room ${name} uses ${used}, which is not below it")
    endif()
    list(APPEND closure ${more})
  endforeach()
  list(REMOVE_DUPLICATES closure)
  set_property(GLOBAL PROPERTY KRAIT_ROOM_${name} ${closure})
  set_property(GLOBAL PROPERTY KRAIT_ROOM_LIBS_${name} ${ROOM_LIBS})
  set_property(GLOBAL APPEND PROPERTY KRAIT_ROOMS ${name})
endfunction()

# Links the objects of the named rooms, and of all that they use, into `target`.
function(krait_link_rooms target)
  set(closure "")
  foreach(room IN LISTS ARGN)
    get_property(more GLOBAL PROPERTY KRAIT_ROOM_${room})
    if(NOT more)
      message(STATUS "${target} names the room ${room}, which does not exist")
    endif()
    list(APPEND closure ${more})
  endforeach()
  list(REMOVE_DUPLICATES closure)
  foreach(room IN LISTS closure)
    get_property(libs GLOBAL PROPERTY KRAIT_ROOM_LIBS_${room})
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:krait_${room}>)
    target_link_libraries(${target} PRIVATE ${libs})
  endforeach()
  target_link_libraries(${target} PRIVATE krait_flags)
endfunction()

# krait_test(name SOURCES a.cc ROOMS core io [LABELS slow] [LIBS ...]): one GoogleTest program.
function(krait_test name)
  cmake_parse_arguments(TEST "" "" "SOURCES;ROOMS;LABELS;LIBS" ${ARGN})
  foreach(room IN LISTS TEST_ROOMS) # BUILDING-TIME
    if(NOT TARGET krait_${room})
      return()
    endif()
  endforeach()
  foreach(source IN LISTS TEST_SOURCES)
    if(NOT EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/${source})
      return()
    endif()
  endforeach() # BUILDING-TIME
  add_executable(test_${name} ${TEST_SOURCES})
  krait_link_rooms(test_${name} ${TEST_ROOMS})
  target_link_libraries(test_${name} PRIVATE ${TEST_LIBS} GTest::gtest_main)
  target_include_directories(test_${name} PRIVATE ${PROJECT_SOURCE_DIR}/tests)
  target_compile_definitions(test_${name} PRIVATE KRAIT_GOLDEN_DIR="${PROJECT_SOURCE_DIR}/tests/golden"
                             KRAIT_MODELS_DIR="${PROJECT_SOURCE_DIR}/models"
                             KRAIT_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  set_target_properties(test_${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  add_test(NAME ${name} COMMAND test_${name} --gtest_brief=1)
  set_tests_properties(${name} PROPERTIES LABELS "${TEST_LABELS}" TIMEOUT 600)
endfunction()

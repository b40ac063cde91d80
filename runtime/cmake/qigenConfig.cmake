# qigen for C and C++ programs: target qigen::runtime, header-only (it opens artifacts with dlopen).
#   find_package(qigen CONFIG REQUIRED)        # cmake -Dqigen_ROOT=$(python -m qigen --cmake-dir)
#   target_link_libraries(app PRIVATE qigen::runtime)
# Paths are relative to this file, so the folder works in a source tree, in a wheel and when moved.
if(NOT TARGET qigen::runtime)
  get_filename_component(qigen_INCLUDE_DIR "${CMAKE_CURRENT_LIST_DIR}/../include" ABSOLUTE)
  add_library(qigen::runtime INTERFACE IMPORTED)
  target_include_directories(qigen::runtime INTERFACE "${qigen_INCLUDE_DIR}")
  target_link_libraries(qigen::runtime INTERFACE ${CMAKE_DL_LIBS})
endif()

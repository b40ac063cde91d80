# The version of the package is the ABI version: an artifact and a program fit if theirs are equal.
file(STRINGS "${CMAKE_CURRENT_LIST_DIR}/../include/qigen.h" qigen_line
     REGEX "^#define QIGEN_ABI_VERSION [0-9]+u$")
string(REGEX REPLACE "[^0-9]" "" PACKAGE_VERSION "${qigen_line}")
if(PACKAGE_FIND_VERSION_MAJOR EQUAL PACKAGE_VERSION)
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
  set(PACKAGE_VERSION_EXACT TRUE)
endif()

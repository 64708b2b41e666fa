# cmake --install: library, headers, and the package files with which find_package(krait) gives krait::krait.
# (The program and its pages are installed in apps/krait/.)
include(CMakePackageConfigHelpers)

install(TARGETS krait krait_simd EXPORT krait-targets ARCHIVE LIBRARY)
set_target_properties(krait_simd PROPERTIES EXPORT_NAME simd)
install(DIRECTORY include/krait TYPE INCLUDE)
install(FILES LICENSE TYPE DOC)

set(package ${CMAKE_INSTALL_LIBDIR}/cmake/krait)
install(EXPORT krait-targets NAMESPACE krait:: DESTINATION ${package})
configure_package_config_file(cmake/krait-config.cmake.in krait-config.cmake INSTALL_DESTINATION ${package}
                              NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(krait-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/krait-config.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/krait-config-version.cmake DESTINATION ${package})

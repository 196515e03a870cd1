# Makes the Python stubs of the protocols of others and puts them into the wheel.
find_package(Python REQUIRED COMPONENTS Interpreter)
get_filename_component(python_programs "${Python_EXECUTABLE}" DIRECTORY)
file(GLOB_RECURSE protos CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/proto/*.proto)
set(stubs ${CMAKE_BINARY_DIR}/stubs)
# The generator's plugins are programs beside the interpreter or, in an isolated build, on the PATH.
add_custom_command(
  OUTPUT ${stubs}/made
  COMMAND ${CMAKE_COMMAND} -E env --modify PATH=path_list_append:${python_programs} --
    ${Python_EXECUTABLE} ${CMAKE_SOURCE_DIR}/proto/generate.py ${stubs}
  COMMAND ${CMAKE_COMMAND} -E touch ${stubs}/made
  DEPENDS ${CMAKE_SOURCE_DIR}/proto/generate.py ${protos}
  VERBATIM)
add_custom_target(stubs ALL DEPENDS ${stubs}/made)
install(DIRECTORY ${stubs}/twinjet/protocols DESTINATION twinjet PATTERN "__pycache__" EXCLUDE)

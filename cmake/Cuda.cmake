# Resolves TWINJET_CUDA to TWINJET_WITH_CUDA and enables the language. The architectures are named
# outright because `native` fails where no GPU is.
include(CheckLanguage)
set(TWINJET_WITH_CUDA OFF)
if(NOT TWINJET_CUDA STREQUAL "OFF")
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(TWINJET_WITH_CUDA ON)
  elseif(TWINJET_CUDA STREQUAL "ON")
    message(FATAL_ERROR "TWINJET_CUDA=ON, but no CUDA compiler was found; put nvcc on PATH or set CUDACXX")
  endif()
endif()
